//! Finds a standby for a read.
//!
//! Each client prefers one standby, by their weights, for as long as that is there and has replayed what the client must not
//! miss ([`crate::positions`]). Else another one serves it, and none for so long that it would wait longer than it may.
//!
//! Leaves out what may be read there ([`crate::reads`]).

use std::sync::Arc;
use std::time::Duration;

use pgherd_core::types::{Instant, NodeName};

use crate::client::Wants;
use crate::pool::ClientId;
use crate::pools::{Lent, NotLent, OnePool};
use crate::routes::Role;
use crate::server::NotIn;
use crate::timer::timeout_at;
use crate::world::World;

/// How long a standby may let a client wait for a connection until another one is tried.
const STANDBY_WITHIN: Duration = Duration::from_secs(2);

/// A server that shows all that was written before `since`, if that is known; `None`: there is none in time. An error: a server
/// does not let this client in.
pub(crate) async fn find_reader(
    wants: &Wants,
    since: Option<Instant>,
    world: &Arc<World>,
) -> Result<Option<(Arc<OnePool>, Lent)>, NotIn> {
    let mut standbys = in_order(world.fence.standbys(), wants.client());
    if standbys.is_empty() {
        return Ok(None);
    }
    let now = tokio::time::Instant::now();
    let until = now + world.settings.load().reads.wait;
    let needed = match since {
        None => None,
        Some(since) => match world.positions.needed(since, until, world).await {
            Some(needed) => Some(needed),
            None => return Ok(None),
        },
    };
    while !standbys.is_empty() {
        let at = match needed {
            None => 0,
            Some(needed) => match world.positions.reached(&standbys, needed, until, world).await {
                Some(at) => at,
                None => return Ok(None),
            },
        };
        let standby = standbys.remove(at);
        let pool = wants.pool(&Role::Standby(standby.clone()), world);
        let lent = match timeout_at(now + STANDBY_WITHIN, wants.lend(&pool, world)).await {
            Ok(Ok(lent)) => lent,
            // It may be about to become the primary. Those who are shut out everywhere hear that from the primary.
            Ok(Err(NotLent::Rejected(why))) if why.is_shut_out() => continue,
            Ok(Err(NotLent::Rejected(why))) => return Err(why),
            Ok(Err(NotLent::Refused(_))) | Err(_) => continue,
        };
        let Some(needed) = needed else { return Ok(Some((pool, lent))) };
        if world.positions.shows(&standby, needed, lent.backend.opened, until, world).await {
            return Ok(Some((pool, lent)));
        }
        pool.give_back(lent, true, world);
    }
    Ok(None)
}

/// The one that this client prefers first. As many clients prefer each as its weight says.
fn in_order(mut standbys: Vec<(NodeName, u32)>, client: ClientId) -> Vec<NodeName> {
    standbys.retain(|(_, weight)| *weight > 0);
    let total: u64 = standbys.iter().map(|(_, weight)| u64::from(*weight)).sum();
    // The golden ratio's multiples lie evenly, so that clients who come one after the other prefer different ones.
    let spread = client.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let mut left = (spread * total) >> 32;
    let first = standbys.iter().position(|(_, weight)| match left.checked_sub(u64::from(*weight)) {
        Some(rest) => {
            left = rest;
            false
        }
        None => true,
    });
    standbys.rotate_left(first.unwrap_or(0));
    standbys.into_iter().map(|(name, _)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_standby_is_preferred_by_its_share_of_the_clients() {
        let standbys: Vec<(NodeName, u32)> =
            [("a", 1), ("b", 3), ("c", 0)].map(|(name, weight)| (name.parse().unwrap(), weight)).to_vec();
        let mut preferred = [0, 0];
        for client in 0..4_000 {
            let order = in_order(standbys.clone(), ClientId(client));
            assert_eq!(order, in_order(standbys.clone(), ClientId(client)), "always the same");
            assert_eq!(order.len(), 2, "no client prefers none, and nobody reads from the third");
            preferred[usize::from(order[0].as_str() == "b")] += 1;
        }
        assert!((980..1_020).contains(&preferred[0]), "{preferred:?}");
        assert_eq!(in_order(Vec::new(), ClientId(1)), []);
    }
}
