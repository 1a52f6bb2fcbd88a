//! A client whose servers are its own for a transaction only.
//!
//! Between two transactions it has none, and is nothing but a socket that is waited for. When it says something it is lent a
//! server, which is first brought to what this client has set; when its transaction is over, the server is asked for what it
//! may have left there, and goes to the next client, unless something in it cannot move ([`sql::Tie`], [`Unmovable`]): then it is
//! kept until that is gone.
//!
//! Leaves out what is left behind ([`crate::session::shared`], [`crate::sql`]). Hazard: a server that is given away before it
//! is known what is in it.

use std::sync::Arc;

use bytes::BytesMut;
use pgherd_pgwire::SqlState;
use pgherd_pgwire::message::build;

use crate::backend::{Backend, NotDone};
use crate::cancel::Ticket;
use crate::client::{Farewell, Left, Wants, begin, gone, greet, leave, left, use_server};
use crate::counts::Pins;
use crate::net::Stream;
use crate::pools::{Lent, OnePool};
use crate::proxy::Access;
use crate::relay::{End, Link};
use crate::routes::Role;
use crate::session::{Loan, Mode, Session};
use crate::settings::Values;
use crate::sql::{self, Effects, Ties, Unmovable};
use crate::statements::Known;
use crate::world::World;

/// A client is given so many servers that are lost before they were of use; then something is wrong with all of them.
const MOST_SERVERS: usize = 10;

/// What follows a client from server to server, besides its statements.
struct Sharing<'a> {
    wants: &'a Wants,
    ticket: &'a Ticket,
    world: &'a Arc<World>,
    /// What it came in with,
    startup: Arc<Values>,
    /// and what it has now.
    settings: Arc<Values>,
    /// What it was told of its server's parameters.
    told: Arc<Vec<(Vec<u8>, Vec<u8>)>>,
    /// Why it kept its server, as it was last logged: an application that does so does so all day.
    reported: Option<String>,
    /// It asks for what sequences gave it, and must not get what they gave to others.
    recalls_sequences: bool,
    /// Where it writes: known from the beginning, so that nobody has to look it up for each transaction.
    primaries: Arc<OnePool>,
}

pub(crate) async fn share(
    stream: &mut Stream,
    out: &mut BytesMut,
    wants: &Wants,
    startup: Vec<(String, String)>,
    ticket: &Ticket,
    mode: Mode,
    world: &Arc<World>,
) -> Result<Left, Farewell> {
    let (pool, lent) = tokio::select! {
        found = wants.first(world) => found?,
        left = gone(stream, &wants.card) => return Ok(left),
    };
    let startup = Arc::new(wants.settings(startup, &lent.backend));
    let lent = begin(&pool, lent, &startup, false, world).await?;
    let told = Arc::clone(&lent.backend.welcome.parameters);
    let greeted = greet(stream, out, &lent.backend, ticket).await;
    pool.give_back(lent, true, world);
    if greeted.is_err() {
        return Ok(Left::ByItself);
    }
    let settings = Arc::clone(&startup);
    let primaries = wants.pool(&Role::Primary, world);
    let mut sharing = Sharing {
        wants,
        ticket,
        world,
        startup,
        settings,
        told,
        reported: None,
        recalls_sequences: false,
        primaries,
    };
    let mut session = Session::sharing(mode, Arc::clone(&world.statements));
    let mut link = Link::asking(&wants.card, world);
    loop {
        if !link.is_asked(stream).await {
            return Ok(if wants.card.is_dismissed() { Left::Dismissed } else { Left::ByItself });
        }
        match link.answer_aside(&session) {
            Ok(true) => continue,
            Ok(false) => {}
            Err(fault) => {
                *out = link.take_unsaid();
                return Err(fault.into());
            }
        }
        if link.unread().first() == Some(&b'X') {
            return Ok(Left::ByItself);
        }
        if link.answer(|unread, answers| session.answer_without_server(unread, answers)) {
            continue;
        }
        let done = sharing.transaction(stream, &mut session, &mut link).await;
        match done {
            Ok(None) => {}
            Ok(Some(left)) => {
                *out = link.take_unsaid();
                return Ok(left);
            }
            Err(farewell) => {
                *out = link.take_unsaid();
                return Err(farewell);
            }
        }
    }
}

impl Sharing<'_> {
    /// From the first word of a transaction to its end. `None`: the client stays.
    async fn transaction(
        &mut self,
        stream: &mut Stream,
        session: &mut Session,
        link: &mut Link,
    ) -> Result<Option<Left>, Farewell> {
        for _ in 0..MOST_SERVERS {
            let found = tokio::select! {
                biased;
                found = self.find() => found?,
                left = gone(stream, &self.wants.card) => return Ok(Some(left)),
            };
            let (pool, lent) = found;
            let recalls = self.recalls_sequences || sql::may_recall_sequences(link.unread());
            let mut lent = begin(&pool, lent, &self.settings, recalls, self.world).await?;
            let mut held = Held::default();
            let end = self.use_server(stream, &pool, &mut lent, session, &mut held, link).await;
            let is_lost = matches!(end, End::ServerLost(_));
            if (is_lost || matches!(end, End::Rerouted)) && session.is_untouched() {
                // It was told nothing of what its client wants; another one will be.
                self.world.ledger.spared();
                match is_lost {
                    true => pool.gone(lent.server, self.world),
                    false => pool.give_back(lent, false, self.world),
                }
                continue;
            }
            let gone = left(&end, session, &lent.backend, self.world);
            match end {
                End::Over => {
                    pool.give_back(lent, true, self.world);
                    return Ok(None);
                }
                End::ServerLost(_) => pool.gone(lent.server, self.world),
                // What was tied to it is let go; what nobody knows goes with the connection.
                End::ClientLeft if session.is_clean() && held.unmovable.is_none() => {
                    leave(&pool, lent, true, self.world).await;
                }
                _ => pool.give_back(lent, false, self.world),
            }
            return gone.map(Some);
        }
        let message = format!("{MOST_SERVERS} servers were lost before anything was sent to them");
        Err(Farewell::new(SqlState::CONNECTION_FAILURE, message))
    }

    async fn use_server(
        &mut self,
        stream: &mut Stream,
        pool: &Arc<OnePool>,
        lent: &mut Lent,
        session: &mut Session,
        held: &mut Held,
        link: &mut Link,
    ) -> End {
        let Lent { server, backend } = lent;
        self.tell(backend, link);
        let known = std::mem::replace(&mut backend.known, Known::new(1));
        session.attach(Loan::new(known, self.settings.meaning()));
        let end = loop {
            let mut admission = pool.admission(*server, backend, self.world);
            let end = use_server(stream, backend, &mut admission, session, link, self.ticket).await;
            if !matches!(end, End::Over) {
                break end;
            }
            let settled = self.settle(backend, session, held).await;
            let overheard = backend.overheard.split();
            link.say(|to| to.extend_from_slice(&overheard));
            match settled {
                Ok(true) => break End::Over,
                Ok(false) => session.go_on(self.settings.meaning()),
                Err(end) => break end,
            }
        };
        self.wants.card.unpin();
        // A cancel that is on its way hits this client's server, and nobody else's.
        self.ticket.slot.lock().await.take();
        if let Some(loan) = session.detach() {
            backend.known = loan.known;
            // One too many is not told to the next client; whoever reports so many is not PostgreSQL.
            let _has_room = loan.noted.iter().all(|(name, value)| backend.welcome.note(name, value));
        }
        self.told = Arc::clone(&backend.welcome.parameters);
        end
    }

    async fn find(&self) -> Result<(Arc<OnePool>, Lent), Farewell> {
        if self.wants.access() == Access::ReadOnly {
            return self.wants.find(self.world).await;
        }
        let lent = self.wants.lend(&self.primaries, self.world).await?;
        Ok((Arc::clone(&self.primaries), lent))
    }

    /// What is different at this server, though the client has not changed it.
    fn tell(&mut self, backend: &Backend, link: &mut Link) {
        let is = &backend.welcome.parameters;
        if Arc::ptr_eq(is, &self.told) {
            return;
        }
        for (name, value) in is.iter().filter(|parameter| !self.told.contains(parameter)) {
            link.say(|to| {
                // They came in such a message.
                let fits = build::parameter_status(to, name, value);
                debug_assert!(fits.is_ok(), "{fits:?}");
            });
        }
    }

    /// A transaction is over. `false`: something in the server cannot move.
    async fn settle(
        &mut self,
        backend: &mut Backend,
        session: &mut Session,
        held: &mut Held,
    ) -> Result<bool, End> {
        let effects = session.take_effects();
        if effects.is_none() {
            return Ok(held.is_nothing());
        }
        self.recalls_sequences |= effects.recalls_sequences;
        held.unmovable = held.unmovable.or(effects.unmovable);
        held.effects.absorb(&effects);
        match backend.inspect(&held.effects, &self.startup).await {
            Ok(found) => {
                self.settings = match found.client == *self.settings {
                    true => Arc::clone(&self.settings),
                    false => Arc::new(found.client),
                };
                held.ties = found.ties;
            }
            Err(NotDone::Lost(why)) => return Err(End::ServerLost(why)),
            Err(NotDone::Refused { sqlstate, message }) => {
                tracing::warn!(%sqlstate, message, "a server does not say what a client left in it, and stays with it");
                held.unmovable = Some(Unmovable::Unanswered);
            }
        }
        let pins = Pins::of(held.ties, held.unmovable);
        if !pins.is_empty() && self.wants.card.pin(pins) {
            self.world.ledger.pinned(pins);
        }
        if held.is_nothing() {
            held.effects = Effects::default();
        } else if self.reported.as_ref() != Some(&held.reasons()) {
            let reasons = held.reasons();
            let (database, user) = self.wants.names();
            tracing::info!(
                database,
                user,
                pid = backend.welcome.pid,
                "a client keeps its server for {reasons}"
            );
            self.reported = Some(reasons);
        }
        Ok(held.is_nothing())
    }
}

/// What holds a client to its server.
#[derive(Debug, Default)]
struct Held {
    ties: Ties,
    unmovable: Option<Unmovable>,
    /// Of all that was done since it is held: what was prepared then may be executed now.
    effects: Effects,
}

impl Held {
    fn is_nothing(&self) -> bool {
        self.ties.is_empty() && self.unmovable.is_none()
    }

    fn reasons(&self) -> String {
        let ties = self.ties.iter().map(|tie| tie.to_string());
        ties.chain(self.unmovable.map(|why| why.to_string())).collect::<Vec<_>>().join(", ")
    }
}
