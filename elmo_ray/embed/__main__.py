"""`python -m elmo_ray.embed`."""

import sys

from elmo_ray.embed import main

sys.exit(main())
