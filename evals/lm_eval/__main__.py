import sys

from evals.lm_eval import main

sys.exit(main())
