//! The address that moves with the gate is never on two hosts, and never on one whose gate is closed.
//!
//! It is on a host from the decision to hold it until the decision to drop it, or until the kernel removes it, which is
//! as late as kernels have been seen to do it.

use pgherd_core::action::Address;
use pgherd_core::spec::vip::GONE_BEFORE_LEASE_END;
use pgherd_core::types::Instant;

use crate::breakage::Breakage;
use crate::checkers::gates::superseded;
use crate::world::{MS, Time, World};

const INVARIANT: &str = "the address is on one host";

pub fn decided(world: &mut World, node: usize, address: Address, now: Instant) {
    match address {
        Address::Leave => {}
        Address::Drop if world.broken(Breakage::AddressKeptThroughAStop) => {}
        Address::Drop => world.nodes[node].address_until = 0,
        Address::Hold { .. } if world.broken(Breakage::AddressOutlivesItsLease) => {
            world.nodes[node].address_until = Time::MAX;
        }
        Address::Hold { until } => {
            let left = (until + GONE_BEFORE_LEASE_END).since(now);
            let left = world.nodes[node].clock.true_span(left);
            world.nodes[node].address_until = world.now + left;
            one_host(world, node);
        }
    }
}

/// Whoever comes next finds it free. An old primary whose agent was frozen may open late, and takes nothing.
pub fn gate_opened(world: &mut World, node: usize) {
    if !superseded(world, node) {
        one_host(world, node);
    }
}

/// At its own gate's end the address has left before.
pub fn gate_closes(world: &mut World, node: usize) {
    if world.nodes[node].address_until > world.now {
        let detail = format!("{} closes its gate while it has the address", world.nodes[node].name);
        world.violate("the address goes before the gate closes", detail);
    }
}

fn one_host(world: &mut World, node: usize) {
    // Where an operator accepted loss, an old primary that nobody reached may go on.
    let promised = |world: &World, node: usize| world.counts(world.nodes[node].postgres.hand);
    if !promised(world, node) {
        return;
    }
    let other = (0..world.nodes.len()).find(|other| {
        *other != node && world.nodes[*other].address_until > world.now && promised(world, *other)
    });
    if let Some(other) = other {
        let left = world.nodes[other].address_until - world.now;
        let (name, other) = (world.nodes[node].name.clone(), world.nodes[other].name.clone());
        world.violate(INVARIANT, format!("{name} takes it {} ms before {other} is rid of it", left / MS));
    }
}
