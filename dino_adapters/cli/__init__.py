"""Words to calls: the command line. The only room that prints, sets up logging and exits."""
