//! Simulations of what controllers and agents stand on.
//!
//! [`etcd`] is the model of etcd that they use.

pub mod etcd;
