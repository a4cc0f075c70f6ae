"""timing.py TARGETS THREADS zipf|zipf1k|one|text: time and memory of eval_sliding.mix; text reads DATA_PATH."""
import os,sys,time,torch,resource,numpy as np
import eval_sliding as e
n=int(float(sys.argv[1])); torch.set_num_threads(int(sys.argv[2])); kind=sys.argv[3]
rng=np.random.default_rng(0)
def make(n,V):
    p=1/(np.arange(V-2)+3.7); c=np.cumsum(p/p.sum())
    x=(np.searchsorted(c,rng.random(n+1))+2).clip(max=V-1).astype(np.int32)
    # documents of 1,000 tokens or so, and a third of the text is copied from before
    x[np.cumsum(rng.geometric(1e-3,size=n//900))%n]=1
    at=1000
    while at<n:
        at+=int(rng.geometric(1/400)); L=min(int(rng.geometric(1/200)),n-at)
        if L<=0: break
        s=int(rng.integers(0,at)); L=min(L,at-s); x[at:at+L]=x[s:s+L]; at+=L
    return x
if kind=='zipf': x=make(n,8192)
elif kind=='zipf1k': x=make(n,1024)
elif kind=='one': x=np.full(n+1,7,np.int32)
elif kind=='text':
    t=np.fromfile(os.environ['DATA_PATH']+'/fineweb_train_000000.bin',dtype=np.uint16,offset=1024).astype(np.int32); x=np.tile(t,n//len(t)+1)[:n+1]
x=torch.from_numpy(x); l=torch.rand(n)*6
m0=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for i in [int(sys.argv[2])]:
    torch.set_num_threads(i)
    t=time.process_time(); w=time.time(); mx,_=e.mix(l,x)
    print(kind,n,'threads',torch.get_num_threads(),f'wall {time.time()-w:.1f} cpu {time.process_time()-t:.1f}', float(l.mean()),float(mx.mean()),'peak bytes/target',(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-m0)*1024/n, 'rss GB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6,flush=True)
