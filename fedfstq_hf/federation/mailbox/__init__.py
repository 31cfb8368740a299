"""Where a federation lies: the protocol of a mailbox, folders, and repos on the Hub."""
