"""`emp tokenize` that saves its place after each batch and takes its time, for a test that kills it."""

import sys
import time

from emp_callbacks.cli.tokenize import tokenize
from emp_callbacks.study import token_output


def main():
    token_output._SAVED_EVERY = -1.0
    add = token_output.TokenOutput.add

    def slowly(output, *found):
        add(output, *found)
        time.sleep(0.2)

    token_output.TokenOutput.add = slowly
    tokenize(sys.argv[1:])


if __name__ == "__main__":
    main()
