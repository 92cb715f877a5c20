"""What tests share: the command line, tiny networks and runs, servers, reference numbers."""
