"""The engine that makes MLMR-SD: question-answer pairs from masks and labels. Run `python -m data_gen --help`."""
