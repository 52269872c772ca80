"""Local minima: certificates, polishing, and problems whose minima are known."""
