"""Tables and pictures from results files."""
