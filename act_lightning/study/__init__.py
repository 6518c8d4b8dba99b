"""Studies: questions put to trained policies, each with its measure and its picture."""
