"""`python -m undermesh.cli` is `undermesh`."""

from undermesh.cli.main import main

if __name__ == "__main__":
    main(prog_name="undermesh")
