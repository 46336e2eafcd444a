"""Ray itself: joining or starting it, its errors, what it leaves behind."""
