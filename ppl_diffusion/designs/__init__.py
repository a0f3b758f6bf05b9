"""The main job: design sequences under a prior and a question, judge them, write a run folder."""
