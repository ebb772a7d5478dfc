"""An id of this database, by which folders are marked that belong to it."""

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    made = op.create_table(
        "installation", sa.Column("id", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_installation"),
    )  # fmt: skip
    op.bulk_insert(made, [{"id": uuid.uuid4().hex}])


def downgrade() -> None:
    op.drop_table("installation")
