"""The cluster's own certificate authority: makes, renews and revokes certificates, and invites nodes."""
