"""Jobs of a sweep: processes of their own, the devices that they are lent, and what is shown of them."""
