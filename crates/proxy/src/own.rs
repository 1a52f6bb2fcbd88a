//! The proxy's own connections: in a role of its own, in a database of its own, for questions of its own.
//!
//! What a client's startup packet says never reaches them (CVE-2025-12819), and they are verified in full however little is
//! asked of servers elsewhere: what is asked here are the verifiers of passwords.

use pgherd_pgwire::login::{self, Purpose};
use pgherd_pgwire::startup::Replication;

use crate::backend::{Backend, NotDone};
use crate::pool::Place;
use crate::routes::Target;
use crate::server::NotIn;
use crate::verifiers::AuthQuery;
use crate::world::World;

/// The one that is there, if it leads to this place and lives, or else a new one.
pub(crate) async fn connect(
    known: Option<Backend>,
    place: Place,
    target: Target,
    world: &World,
) -> Result<Backend, NotIn> {
    if let Some(known) = known.filter(|known| known.place == place && known.stream.is_quiet()) {
        return Ok(known);
    }
    let AuthQuery { user, database, .. } = world.verifiers.query().clone();
    // Whatever is set for the role or the database, its operators are PostgreSQL's.
    let parameters = [("application_name", "pgherd proxy"), ("search_path", "pg_catalog")];
    let parameters = parameters.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let purpose = Purpose { user, database, replication: Replication::Off, parameters, is_certified: true };
    Backend::open(place, target, world.own_way(), &purpose, None).await
}

impl From<NotDone> for NotIn {
    /// Whoever cannot ask is as good as not in.
    fn from(error: NotDone) -> NotIn {
        match error {
            NotDone::Refused { sqlstate, message } => {
                login::NotIn::Refused { sqlstate, message, detail: None, hint: None }.into()
            }
            NotDone::Lost(why) => NotIn::Unreachable(why),
        }
    }
}
