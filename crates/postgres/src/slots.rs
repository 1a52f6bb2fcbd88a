//! Physical replication slots: each member has its own, under its name, on every node that may become primary.
//!
//! Slots that do not carry the name of one of the herd's members belong to somebody else and are never dropped or
//! moved. Leaves out: which member needs one. Hazard: a slot that nobody drops fills the disk up to its cap; one
//! that is dropped too early costs its member a clone.

use std::time::Duration;

use pgherd_core::types::{Lsn, Member, NodeName};

use crate::conf::slot_name;
use crate::error::{Error, Result, within};
use crate::sql::{Remote, Session};

/// What PostgreSQL still keeps for a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WalStatus {
    Reserved,
    /// More than `max_wal_size`, kept all the same.
    Extended,
    /// Over the cap: the next checkpoint may take it.
    Unreserved,
    /// Taken. The member has to be cloned again, or fetch WAL from the archive.
    Lost,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slot {
    pub name: String,
    /// `None`: not one of the herd's members.
    pub member: Option<Member>,
    pub active_pid: Option<i32>,
    /// `None`: it keeps nothing yet.
    pub restart_lsn: Option<Lsn>,
    pub wal_status: Option<WalStatus>,
    pub logical: bool,
    pub temporary: bool,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SlotError {
    #[error("slot {name} is not a member's: it stays")]
    Foreign { name: String },

    #[error("slot {name} is in use by process {pid}")]
    Active { name: String, pid: i32 },

    #[error("slot {name} does not exist")]
    Missing { name: String },

    #[error(transparent)]
    Other(#[from] Error),
}

/// From where on another node keeps WAL for a member; `None`: it has no slot there, or one that keeps nothing.
pub async fn kept_from(source: &Remote, member: &Member, deadline: Duration) -> Result<Option<Lsn>> {
    let session = Session::remote(source, deadline).await?;
    let query = "SELECT restart_lsn::text FROM pg_catalog.pg_replication_slots \
                 WHERE slot_name = $1 AND wal_status IS DISTINCT FROM 'lost'";
    let row = within("asking for a slot", deadline, async {
        let name = slot_name(member);
        session.query_opt(query, &[&name]).await.map_err(Error::sql("show its replication slots"))
    })
    .await?;
    Ok(row.and_then(|row| row.get::<_, Option<String>>(0)).and_then(|lsn| lsn.parse().ok()))
}

/// All slots, also other people's. `nodes` are the herd's.
pub async fn list(session: &Session, nodes: &[NodeName], deadline: Duration) -> Result<Vec<Slot>> {
    let query = "SELECT slot_name::text, active_pid, restart_lsn::text, wal_status, slot_type, temporary \
                 FROM pg_catalog.pg_replication_slots ORDER BY slot_name";
    within("listing the slots", deadline, async {
        let rows = session.query(query, &[]).await.map_err(Error::sql("list its slots"))?;
        Ok(rows
            .iter()
            .map(|row| {
                let name: String = row.get(0);
                let member = member_of(&name, nodes);
                Slot {
                    member,
                    active_pid: row.get(1),
                    restart_lsn: row.get::<_, Option<String>>(2).and_then(|lsn| lsn.parse().ok()),
                    wal_status: row.get::<_, Option<String>>(3).and_then(|status| parse_status(&status)),
                    logical: row.get::<_, String>(4) == "logical",
                    temporary: row.get(5),
                    name,
                }
            })
            .collect())
    })
    .await
}

pub(crate) fn parse_status(text: &str) -> Option<WalStatus> {
    Some(match text {
        "reserved" => WalStatus::Reserved,
        "extended" => WalStatus::Extended,
        "unreserved" => WalStatus::Unreserved,
        "lost" => WalStatus::Lost,
        _ => return None,
    })
}

fn member_of(slot: &str, nodes: &[NodeName]) -> Option<Member> {
    slot.parse::<Member>().ok().filter(|member| nodes.contains(&member.node))
}

/// Creates a member's slot if it is missing. It keeps WAL from now on, before the member has ever connected, so that
/// nothing is removed between its clone and its first connection. `true` if it was created.
pub async fn ensure(session: &Session, member: &Member, deadline: Duration) -> Result<bool, SlotError> {
    create(session, &slot_name(member), deadline).await
}

async fn create(session: &Session, name: &str, deadline: Duration) -> Result<bool, SlotError> {
    within("creating a slot", deadline, async {
        let created = session
            .query_opt(
                "SELECT pg_catalog.pg_create_physical_replication_slot($1::text::name, true) \
                 WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_replication_slots WHERE slot_name = $1::text::name)",
                &[&name],
            )
            .await;
        match created {
            Ok(row) => Ok(row.is_some()),
            // Somebody was faster.
            Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::DUPLICATE_OBJECT) => Ok(false),
            Err(error) => Err(Error::sql("create a slot")(error).into()),
        }
    })
    .await
}

/// Drops a member's slot if it is there. `nodes` are all that ever belonged to the herd, `name` must be that of one.
pub async fn drop(
    session: &Session,
    name: &str,
    nodes: &[NodeName],
    deadline: Duration,
) -> Result<bool, SlotError> {
    if member_of(name, nodes).is_none() {
        return Err(SlotError::Foreign { name: name.to_owned() });
    }
    remove(session, name, deadline).await
}

async fn remove(session: &Session, name: &str, deadline: Duration) -> Result<bool, SlotError> {
    within("dropping a slot", deadline, async {
        let query = "SELECT active_pid, slot_type FROM pg_catalog.pg_replication_slots WHERE slot_name = $1::text::name";
        let found = session.query_opt(query, &[&name]).await.map_err(Error::sql("look for a slot"))?;
        let Some(row) = found else { return Ok(false) };
        if row.get::<_, String>(1) != "physical" {
            return Err(SlotError::Foreign { name: name.to_owned() });
        }
        if let Some(pid) = row.get::<_, Option<i32>>(0) {
            return Err(SlotError::Active { name: name.to_owned(), pid });
        }
        let dropped = session.execute("SELECT pg_catalog.pg_drop_replication_slot($1::text::name)", &[&name]).await;
        match dropped {
            Ok(_) => Ok(true),
            Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::OBJECT_IN_USE) => {
                Err(SlotError::Active { name: name.to_owned(), pid: 0 })
            }
            Err(error) => Err(Error::sql("drop a slot")(error).into()),
        }
    })
    .await
}

/// Lets go of the WAL before `lsn` in a member's slot on a node that the member does not stream from. Never moves it
/// back, and not beyond what this node has itself; returns where it stands.
pub async fn advance(
    session: &Session,
    member: &Member,
    lsn: Lsn,
    deadline: Duration,
) -> Result<Lsn, SlotError> {
    move_along(session, &slot_name(member), lsn, deadline).await
}

async fn move_along(session: &Session, name: &str, lsn: Lsn, deadline: Duration) -> Result<Lsn, SlotError> {
    within("advancing a slot", deadline, async {
        let query = "SELECT active_pid, restart_lsn::text, \
                     CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_replay_lsn() \
                          ELSE pg_catalog.pg_current_wal_flush_lsn() END::text \
                     FROM pg_catalog.pg_replication_slots WHERE slot_name = $1::text::name AND slot_type = 'physical'";
        let found = session.query_opt(query, &[&name]).await.map_err(Error::sql("look for a slot"))?;
        let Some(row) = found else { return Err(SlotError::Missing { name: name.to_owned() }) };
        if let Some(pid) = row.get::<_, Option<i32>>(0) {
            return Err(SlotError::Active { name: name.to_owned(), pid });
        }
        let at = |column| row.get::<_, Option<String>>(column).and_then(|lsn| lsn.parse::<Lsn>().ok());
        let (stands, here) = (at(1).unwrap_or_default(), at(2).unwrap_or_default());
        let target = lsn.min(here);
        if target <= stands {
            return Ok(stands);
        }
        let query = "SELECT end_lsn::text FROM pg_catalog.pg_replication_slot_advance($1::text::name, $2::text::pg_lsn)";
        let row = session
            .query_one(query, &[&name, &target.to_string()])
            .await
            .map_err(Error::sql("advance a slot"))?;
        Ok(row.get::<_, String>(0).parse().unwrap_or(target))
    })
    .await
}

/// Brings the slots of members on a standby up to date: each of `kept` has one, which holds nothing back that its
/// member has (`None`: not known, so it stays where it is); former incarnations have none. `nodes` are all that
/// ever belonged to the herd. Slots that somebody streams from are left alone.
pub async fn keep(
    session: &Session,
    kept: &[(Member, Option<Lsn>)],
    nodes: &[NodeName],
    deadline: Duration,
) -> Result<(), SlotError> {
    let here = list(session, nodes, deadline).await?;
    let idle = || here.iter().filter(|slot| slot.active_pid.is_none() && !slot.logical && !slot.temporary);
    let former = |slot: &&Slot| {
        let member = slot.member.as_ref();
        member
            .is_some_and(|member| kept.iter().any(|(other, _)| other.node == member.node && other != member))
    };
    for slot in idle().filter(former) {
        drop(session, &slot.name, nodes, deadline).await?;
    }
    // It keeps nothing any more and never will again; nobody has needed it so far.
    let lost = |slot: &&Slot| {
        slot.wal_status == Some(WalStatus::Lost)
            && kept.iter().any(|(member, _)| slot_name(member) == slot.name)
    };
    for slot in idle().filter(lost) {
        drop(session, &slot.name, nodes, deadline).await?;
    }
    for (member, has) in kept {
        let known = idle().find(|slot| slot.name == slot_name(member)).filter(|slot| !lost(slot));
        match (known, has) {
            (Some(slot), Some(has)) if slot.restart_lsn.is_none_or(|stands| stands < *has) => {
                match advance(session, member, *has, deadline).await {
                    // Its member was faster, and streams from it now.
                    Ok(_) | Err(SlotError::Active { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            (Some(_), _) => {}
            (None, _) => {
                // Also where it is there and in use, which this finds out.
                ensure(session, member, deadline).await?;
            }
        }
    }
    Ok(())
}

/// The archive's own slot. No member can have this name: those end with a number.
pub const ARCHIVE: &str = "pgherd_archive";

/// Keeps the archive's slot on a server: it holds WAL for whoever streams into the repository from here next, and lets go of what is durable there
/// (`durable`; `None`: not known, so it stays where it is). One that has lost its WAL (`max_slot_wal_keep_size`) is made anew, from
/// now on: what it lost is a gap, and nothing here brings it back. `true`: that has happened.
pub async fn keep_archive(
    session: &Session,
    durable: Option<Lsn>,
    deadline: Duration,
) -> Result<bool, SlotError> {
    let here = list(session, &[], deadline).await?;
    let Some(slot) = here.iter().find(|slot| slot.name == ARCHIVE) else {
        create(session, ARCHIVE, deadline).await?;
        return Ok(false);
    };
    if slot.active_pid.is_some() {
        return Ok(false);
    }
    if slot.wal_status == Some(WalStatus::Lost) {
        remove(session, ARCHIVE, deadline).await?;
        create(session, ARCHIVE, deadline).await?;
        return Ok(true);
    }
    if let Some(durable) = durable.filter(|durable| slot.restart_lsn.is_none_or(|stands| stands < *durable)) {
        match move_along(session, ARCHIVE, durable, deadline).await {
            // Whoever streams was faster.
            Ok(_) | Err(SlotError::Active { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Drops the archive's slot, where nobody archives any more. `true` if it was there.
pub async fn drop_archive(session: &Session, deadline: Duration) -> Result<bool, SlotError> {
    remove(session, ARCHIVE, deadline).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_members_of_this_herd_have_slots_of_ours() {
        let nodes = ["a".parse().unwrap(), "db_1".parse().unwrap()];
        assert!(member_of("a_7", &nodes).is_some());
        assert!(member_of("db_1_12", &nodes).is_some());
        for foreign in ["c_7", "a", "barman", "a_x", "test_sub", "db_1"] {
            assert_eq!(member_of(foreign, &nodes), None, "{foreign}");
        }
    }
}
