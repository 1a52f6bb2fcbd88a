//! What PostgreSQL stores of the users' passwords, asked for when somebody comes.
//!
//! One connection to the primary ([`crate::own`]), in a role that may read this and nothing else. While no agent is heard, and
//! so nobody known to be the primary, standbys are asked instead, as they would be if the client came to them directly; only
//! that a role is not there they are not believed. An answer is good for a moment, so that a thousand
//! clients who come at once ask once. Roles that may not log in, and passwords that have run out, are as good as none
//! (CVE-2025-2291).
//!
//! Leaves out what is done with it ([`crate::login`]).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pgherd_pgwire::md5::Md5Hash;
use pgherd_pgwire::scram::Verifier;
use tokio::time::Instant;

use crate::backend::Backend;
use crate::own;
use crate::pool::Place;
use crate::routes::{Hold, Role, Route, Target};
use crate::server::NotIn;
use crate::timer::{sleep_until, timeout_at};
use crate::world::{NoRandomness, World, random};

const GOOD_FOR: Duration = Duration::from_secs(1);
/// Names that were asked for and are forgotten together: strangers must not fill the memory.
const MAX_KNOWN: usize = 10_000;
const ASK_WITHIN: Duration = Duration::from_secs(5);
/// Two rows: of the user, and of the one whose verifier is the secret. In one query, so that it takes as long for those who do not exist.
const QUERY: &[u8] =
    b"VALUES ((SELECT rolpassword FROM pg_catalog.pg_authid WHERE rolname = $1 AND rolcanlogin \
     AND (rolvaliduntil IS NULL OR rolvaliduntil > pg_catalog.now()))), \
     ((SELECT rolpassword FROM pg_catalog.pg_authid WHERE rolname = $2))";

/// As whom and where it is asked.
#[derive(Clone, Debug)]
pub struct AuthQuery {
    pub user: String,
    pub database: String,
    /// A role with a password. Its verifier, which whoever knows may know who exists, is what proxies in front of the same servers,
    /// and all processes of each, have in common: users who do not exist have the same salt with all of them, as those who do.
    /// `None`, or one without: a salt for each process.
    pub secret_of: Option<String>,
}

pub(crate) struct Verifiers {
    query: AuthQuery,
    known: Mutex<HashMap<String, (Known, Instant)>>,
    connection: tokio::sync::Mutex<Option<Backend>>,
    /// Makes the verifiers of those who do not exist, where no role's verifier does.
    own_secret: [u8; 32],
}

/// By what a user may prove himself.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    /// That of nobody, where there is no password for SCRAM.
    pub(crate) verifier: Verifier,
    /// The password is stored for md5.
    pub(crate) md5: Option<Md5Hash>,
}

/// What a server stores.
#[derive(Debug, Default, PartialEq, Eq)]
struct Stored {
    /// For the user, if that may log in.
    verifier: Option<String>,
    /// For the role whose verifier is the secret.
    secret: Option<String>,
}

impl Verifiers {
    pub(crate) fn new(query: AuthQuery) -> Result<Verifiers, NoRandomness> {
        Ok(Verifiers {
            query,
            known: Mutex::default(),
            connection: tokio::sync::Mutex::default(),
            own_secret: random()?,
        })
    }

    /// As whom and where the proxy asks for itself.
    pub(crate) fn query(&self) -> &AuthQuery {
        &self.query
    }

    /// Of this user, or of nobody. Waits for a primary as long as clients may, and no longer than `until`.
    pub(crate) async fn of(&self, user: &str, until: Instant, world: &Arc<World>) -> Result<Known, NotIn> {
        let until = until.min(Instant::now() + world.settings.load().limits.hold);
        loop {
            if let Some(known) = self.known(user) {
                return Ok(known);
            }
            let mut changes = world.fence.subscribe();
            let failed = match timeout_at(until, self.ask(user, world)).await {
                Ok(Ok(found)) => return Ok(found),
                Ok(Err(error)) if !error.passes() => return Err(error),
                Ok(Err(error)) => error,
                Err(_) => return Err(NotIn::Unreachable("no server has answered in time".to_owned())),
            };
            tracing::debug!(%failed, "a verifier could not be asked for yet");
            let retry = Instant::now() + world.settings.load().limits.retry;
            if retry >= until {
                return Err(failed);
            }
            // A new route is tried at once.
            tokio::select! {
                () = sleep_until(retry) => {}
                _ = changes.changed() => {}
            }
        }
    }

    /// The next one who comes asks again: a password was changed.
    pub(crate) fn forget(&self, user: &str) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(user);
    }

    /// Closes the connection that nobody needs at the moment. The next one who comes opens another.
    pub(crate) fn rest(&self) {
        if let Ok(mut connection) = self.connection.try_lock() {
            connection.take();
        }
    }

    fn known(&self, user: &str) -> Option<Known> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(user).filter(|(_, asked)| asked.elapsed() < GOOD_FOR).map(|(known, _)| known.clone())
    }

    async fn ask(&self, user: &str, world: &Arc<World>) -> Result<Known, NotIn> {
        let mut connection = self.connection.lock().await;
        // Somebody else may have asked while this one waited.
        if let Some(known) = self.known(user) {
            return Ok(known);
        }
        let asked = Instant::now();
        let stored = match world.fence.route(&Role::Primary) {
            Route::To(place, target) => stored(&mut connection, place, target, user, world).await?,
            Route::Hold(Hold::OutOfDate) => self.ask_standbys(&mut connection, user, world).await?,
            Route::Hold(_) => return Err(NotIn::Unreachable("there is no primary at the moment".to_owned())),
        };
        let verifier = stored.verifier.as_deref().and_then(Verifier::parse);
        let md5 = stored.verifier.as_deref().and_then(Md5Hash::parse);
        if stored.verifier.is_some() && verifier.is_none() {
            let needs = match (&md5, world.settings.load().md5_passwords) {
                (Some(_), true) => {
                    "a line of hba with method md5, or \\password in psql, which stores it for SCRAM"
                }
                _ => "\\password in psql, which stores it for SCRAM",
            };
            tracing::warn!(user, needs, "has a password that is not stored for SCRAM");
        }
        let verifier = verifier.unwrap_or_else(|| {
            let shared = stored.secret.as_deref().map(Verifier::secret_from);
            Verifier::of_nobody(user, shared.as_ref().unwrap_or(&self.own_secret))
        });
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        let found = Known { verifier, md5 };
        known.insert(user.to_owned(), (found.clone(), asked));
        Ok(found)
    }

    /// The first one that knows the role.
    async fn ask_standbys(
        &self,
        connection: &mut Option<Backend>,
        user: &str,
        world: &Arc<World>,
    ) -> Result<Stored, NotIn> {
        for (standby, _) in world.fence.standbys() {
            let Route::To(place, target) = world.fence.route(&Role::Standby(standby)) else { continue };
            match stored(connection, place, target, user, world).await {
                Ok(stored) if stored.verifier.is_some() => return Ok(stored),
                Ok(_) => {}
                Err(error) => tracing::debug!(%error, "a standby cannot be asked for a verifier"),
            }
        }
        Err(NotIn::Unreachable("no agent says who is the primary, and no standby knows the role".to_owned()))
    }
}

async fn stored(
    connection: &mut Option<Backend>,
    place: Place,
    target: Target,
    user: &str,
    world: &Arc<World>,
) -> Result<Stored, NotIn> {
    let mut backend = own::connect(connection.take(), place, target, world).await?;
    let secret_of = world.verifiers.query.secret_of.as_deref();
    let rows = backend.values(QUERY, &[Some(user), secret_of], ASK_WITHIN).await?;
    *connection = Some(backend);
    let mut texts = rows.into_iter().map(|row| row.and_then(|text| String::from_utf8(text).ok()));
    Ok(Stored { verifier: texts.next().flatten(), secret: texts.next().flatten() })
}
