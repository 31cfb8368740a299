"""Hub repos as the server's mailbox: `address` and `waiting` below, then one repo, the layouts, and the mailbox."""
