collect_ignore = ["fuzz_atheris.py"]  # a program of `make fuzz`, which needs atheris
