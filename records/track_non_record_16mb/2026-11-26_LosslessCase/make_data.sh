# The four data sets of the study, from the FineWeb sample in DOCS. In the repository's root.
for vocab in 1024 8192; do
  for case in plain lossless; do
    option=$([ $case = plain ] || echo --lossless-case)
    python data/tokenize_docs.py --train "$DOCS/fineweb_train.jsonl.xz" --val "$DOCS/fineweb_val.jsonl.xz" \
      --train-tokenizer $vocab $option --name ${case}_sp$vocab
    python data/tokenize_docs.py --verify data/datasets/${case}_sp$vocab
  done
done
