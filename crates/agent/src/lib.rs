
pub mod pki;
pub mod files;
pub mod agreed;
mod clock;
mod durable;
mod gossip;
mod history;
pub mod identity;
mod mind;
pub mod paths;
mod peers;
mod secrets;
pub mod setup;
mod transport;
