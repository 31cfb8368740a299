"""Who talks to whom: mailboxes, client sessions, the coordinator. Knows codecs and adapters, but no Trainer."""
