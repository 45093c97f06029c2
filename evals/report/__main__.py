import sys

from evals.report.terminal import main

sys.exit(main(sys.argv[1:]))
