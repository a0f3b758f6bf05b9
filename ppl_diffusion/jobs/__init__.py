"""What jobs that leave a folder share: checks of input, run folders, searches, and their options.

``design`` and ``restoration`` stand on it, and do not know each other.
"""
