"""What every process shares and nothing else: errors, acceptance statistics, n-gram drafts. Standard library only."""
