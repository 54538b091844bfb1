"""Several hosts on one machine: network namespaces on one bridge, with real daemons in them. Needs root."""
