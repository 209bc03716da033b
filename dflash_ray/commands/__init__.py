"""What the command line does: serving.py starts the application, client.py talks to a running one."""
