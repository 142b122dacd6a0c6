"""What is looked at before a run costs anything: doctor, plan, and checks of cluster files."""
