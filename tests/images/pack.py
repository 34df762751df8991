#!/usr/bin/env python3
"""pack.py LAYOUT DIR...: an OCI layout of one image, `latest`, whose layers are these directories (overlayfs' upper ones), lowest first."""
import sys

# Nothing is written into the checkout.
sys.dont_write_bytecode = True
import oci  # noqa: E402


def main():
    path, *uppers = sys.argv[1:]
    layout = oci.Layout(path)
    pack = ["pigz", "-6", "-n", "-p", "2"]
    layout.image("latest", [layout.stream(pack, lambda out, upper=upper: oci.write_upper(upper, out)) for upper in uppers])


if __name__ == "__main__":
    main()
