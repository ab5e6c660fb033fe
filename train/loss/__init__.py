"""What is asked of a transcoder: the objective, its terms, schedules and running averages."""
