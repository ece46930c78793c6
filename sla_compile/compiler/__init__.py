"""What one compile does: find and decide sites, give them gates, rewrite the graph; prepare and export do the same."""
