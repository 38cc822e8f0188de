"""What is counted while things run, cheaply enough to be always on, and what is made of it when somebody asks."""
