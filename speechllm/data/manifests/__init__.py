"""The forms of manifests: NeMo, Kaldi, Shar, tar shards, lhotse cuts; each line to a cut."""
