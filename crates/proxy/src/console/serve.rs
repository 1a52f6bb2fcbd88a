//! Carries the bytes of one conversation with the console, once somebody has proven who it is.
//!
//! Who may speak to it stands in the herd file: [`ConsoleAccess`]. That is looked up for each command, so that whoever is taken
//! off the list is off at once. Hazard: a client that does not read what it asked for; so there are few of them at a time, and
//! what is not taken within [`TAKE_WITHIN`] ends the conversation.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use pgherd_pgwire::SqlState;
use pgherd_pgwire::message::build;
use pgherd_pgwire::message::{Key, TransactionStatus};
use tokio::sync::Notify;

use super::{Console, DATABASES, Refused, SERVER_VERSION, Step, deeds};
use crate::cancel::Ticket;
use crate::client::{Farewell, Left, gone};
use crate::counts::NoEntry;
use crate::login::Asked;
use crate::net::Stream;
use crate::roster::Card;
use crate::timer::timeout;
use crate::world::{ConsoleAccess, World};

/// Conversations at a time: people, and programs that look every few seconds.
const MOST_CONSOLES: usize = 64;
const TAKE_WITHIN: Duration = Duration::from_secs(60);

/// What clients are told first.
const PARAMETERS: [(&str, &str); 9] = [
    ("server_version", SERVER_VERSION),
    ("server_encoding", "UTF8"),
    ("client_encoding", "UTF8"),
    ("DateStyle", "ISO, MDY"),
    ("TimeZone", "UTC"),
    ("integer_datetimes", "on"),
    ("standard_conforming_strings", "on"),
    ("is_superuser", "off"),
    ("IntervalStyle", "postgres"),
];

/// Is it the console, and no database?
pub(crate) fn is_meant(asked: &Asked) -> bool {
    DATABASES.contains(&asked.database.as_str())
}

/// Counts a conversation for as long as it lasts.
struct Seat<'a>(&'a World);

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.0.consoles.fetch_sub(1, Ordering::Relaxed);
    }
}

/// `None`: it may not.
fn may_act(access: &ConsoleAccess, user: &str) -> Option<bool> {
    let is_admin = access.admins.contains(user);
    (is_admin || access.readers.contains(user)).then_some(is_admin)
}

pub(crate) async fn serve(
    stream: &mut Stream,
    out: &mut BytesMut,
    asked: &Asked,
    ticket: &Ticket,
    card: &Card,
    world: &Arc<World>,
) -> Result<Left, Farewell> {
    let user = asked.user.as_str();
    let Some(acts) = may_act(&world.settings.load().console, user) else {
        world.ledger.no_entry(NoEntry::Console);
        let message = format!("role \"{user}\" may not use the console of the proxy");
        return Err(Farewell::new(SqlState::INVALID_AUTHORIZATION_SPECIFICATION, message)
            .hint(format!("[proxy] of the herd file names who may: console_admins = [\"{user}\"], or console_readers; then: pgherd apply")));
    };
    let seat = Seat(world);
    if world.consoles.fetch_add(1, Ordering::Relaxed) >= MOST_CONSOLES {
        world.ledger.no_entry(NoEntry::Console);
        let message = format!("more than {MOST_CONSOLES} clients are at the console");
        return Err(Farewell::new(SqlState::TOO_MANY_CONNECTIONS, message));
    }
    let fault =
        |error: &dyn std::fmt::Display| Farewell::new(SqlState::CONNECTION_FAILURE, error.to_string());
    for (name, value) in PARAMETERS {
        build::parameter_status(out, name.as_bytes(), value.as_bytes()).map_err(|error| fault(&error))?;
    }
    build::backend_key_data(out, ticket.pid, Key::new(ticket.key()).map_err(|error| fault(&error))?);
    build::ready_for_query(out, TransactionStatus::Idle);
    let left = talk(stream, out, Console::new(acts), user, ticket, card, world).await;
    drop(seat);
    left
}

async fn talk(
    stream: &mut Stream,
    out: &mut BytesMut,
    mut console: Console,
    user: &str,
    ticket: &Ticket,
    card: &Card,
    world: &Arc<World>,
) -> Result<Left, Farewell> {
    let mut input = BytesMut::new();
    loop {
        if card.is_dismissed() {
            return Ok(Left::Dismissed);
        }
        let mut rest = &input[..];
        let step = console.read(&mut rest, out);
        let taken = input.len() - rest.len();
        input.advance(taken);
        match step {
            Step::Left => return Ok(Left::ByItself),
            Step::Broken { sqlstate, message } => return Err(Farewell::new(sqlstate, message)),
            Step::Perform(command) => {
                let outcome = match may_act(&world.settings.load().console, user) {
                    Some(acts) if acts || !command.acts() => {
                        // Another one for each, so that a cancel that comes late is of no other command.
                        let canceled = Arc::new(Notify::new());
                        ticket.waits_for(Some(&canceled));
                        let outcome = tokio::select! {
                            // What is canceled has begun, and has not ended.
                            biased;
                            outcome = deeds::perform(&command, user, world) => outcome,
                            () = canceled.notified() => Err(deeds::cancel(&command, user, world)),
                            // What was begun holds on: whoever comes next may end it.
                            left = gone(stream, card) => return Ok(left),
                        };
                        ticket.waits_for(None);
                        outcome
                    }
                    _ => Err(Refused::new(b"42501", format!("permission denied for {}", command.tag()))
                        .hint("The herd file has changed who may do that.")),
                };
                console.performed(&command, outcome, out);
                // What came of one is sent before the next is performed, so that answers do not pile up.
                if !sent(stream, out).await {
                    return Ok(Left::ByItself);
                }
            }
            Step::More => {
                if !sent(stream, out).await {
                    return Ok(Left::ByItself);
                }
                let heard = tokio::select! {
                    heard = stream.receive(&mut input) => heard,
                    () = dismissed(card) => return Ok(Left::Dismissed),
                };
                if heard.is_err() {
                    return Ok(Left::ByItself);
                }
            }
        }
    }
}

async fn dismissed(card: &Card) {
    std::future::poll_fn(|_| match card.is_dismissed() {
        true => std::task::Poll::Ready(()),
        false => std::task::Poll::Pending,
    })
    .await;
}

async fn sent(stream: &mut Stream, out: &mut BytesMut) -> bool {
    matches!(timeout(TAKE_WITHIN, stream.send(out)).await, Ok(Ok(())))
}
