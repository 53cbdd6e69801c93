"""From a run's files to pages for people: reads the run directory, and nothing feeds it."""
