"""`python -m vaeserve` is the command `vaeserve`."""

from vaeserve.cli import main

raise SystemExit(main())
