"""Does guided dropout cost anything?"""
