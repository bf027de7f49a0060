"""The paper's comparisons as lists of jobs: what is to be run, how it is run, and what it found."""
