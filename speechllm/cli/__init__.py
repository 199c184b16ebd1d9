"""The command line, `speechllm`: its options are read here and in the recipes, nowhere else."""
