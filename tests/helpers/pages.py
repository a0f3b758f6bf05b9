"""What tests of the documentation share."""

import re

HUB = re.compile(r"## Models of other people\n.*?(?=\n## )", flags=re.DOTALL)
"""The section that asks the hub for models, which a test runs with tiny ones."""
