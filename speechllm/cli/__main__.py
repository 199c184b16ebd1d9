"""`python -m speechllm.cli`, where the command `speechllm` is not on the path."""

from speechllm.cli.main import main

if __name__ == "__main__":
    main()
