"""`python -m nemo_minitron` is the `minitron` command."""

from nemo_minitron.cli import main

if __name__ == "__main__":
    main()
