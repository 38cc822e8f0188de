"""Memory tiers: budgets in bytes, and the policies that decide what leaves. Import from the modules."""
