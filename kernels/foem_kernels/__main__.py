"""python -m foem_kernels tune: time launches on this GPU. python -m foem_kernels cost: what they should cost, on paper."""
import sys

from foem_kernels import cost, tuning


def main() -> int:
    command, *arguments = sys.argv[1:] or [""]
    if command == "tune":
        return tuning.main(arguments)
    if command == "cost":
        return cost.main()
    print(__doc__, file=sys.stderr)
    return 0 if command in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main())
