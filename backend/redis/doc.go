// Package redis keeps channels in Redis: a stream and one small string for each
// channel, appended to by a script, pushed by Redis' publish/subscribe.
//
//	client := goredis.NewClient(&goredis.Options{Addr: "localhost:6379"})
//	ch := dchannel.New("my-channel", redis.New(client))
//
// The client is yours: it is used, and never closed. A standalone server and a
// Sentinel set-up work; so does every server that speaks Redis' protocol and has
// streams and scripts.
//
// # Delivery
//
// An append is one round trip: a script gives out the sequence numbers, writes the
// stream, and publishes the same bytes. Whoever is subscribed has them one network
// hop later; whoever was away reads the stream. Redis runs one script at a time, so
// there is one order for all. The order of a channel outlives its messages (see
// [WithIdleExpiry]), these live as long as [WithRetention] says, and every key that
// this package writes has a time to live, always.
//
// The driver switches off go-redis' own retries for what it writes: they would run
// an append twice without anybody knowing. A frame that reaches the server more than
// a second after it was sent (a paused server, a slow network, a buffer that outlived
// its connection) is looked for in the log before it is appended, as a retry is.
//
// # Close marker
//
// The marker is the last entry of the stream. Stream and head live for the duration
// that was asked for, then Redis removes them.
//
// # Locks
//
// A lock is one hash, and two sorted sets while somebody waits in line. Every call is
// one script, and one round trip: it ends what has expired, hands over, takes its step,
// and publishes if a waiter may care. Times are whole milliseconds, rounded up.
//
// Redis' expiry of keys plays no part: it may come seconds late, and says nothing about
// how a generation ended. The deadline is a number in the hash, in microseconds, that
// each script compares with the server's clock. So a lock is free at its deadline to the
// microsecond, for whoever asks; nobody is told of it, and nothing is handed over, before
// somebody asks. The hash is kept for a day longer than the lock can be held, with how
// the last eight generations ended and the tokens that they had.
//
// While one server runs and keeps its memory, there is at most one holder by that
// server's clock. These are not promised, and only the fence protects from them:
//   - Failover. Replication is asynchronous: a replica that is promoted may not know a
//     generation that was acknowledged, and lets a second holder in. The same goes for a
//     restart that loses the last writes ("appendfsync everysec": a second; no
//     persistence: all), a flush, an eviction, [Backend.Remove].
//   - A clock that jumps. A step forwards ends holds early, as does a promoted replica
//     whose clock is ahead. A step backwards prolongs a hold by at most its TTL, from
//     the next call that sees it.
//   - A holder that stands still for longer than its TTL and does not know.
//
// A fence is the one before it plus one, or the server's time in microseconds if that is
// more. So they grow over a loss of the hash too, unless the clock is then behind the
// last fence: because it was set back, or because a promoted replica's is.
//
// A server that is out of memory refuses new locks, and still extends and releases those
// that it has.
//
// # Reconnect
//
// All subscriptions of a [Backend] share one connection, made at the first and closed
// with the last of them. It is probed when nothing has come for a while
// ([WithProbe]): the probe is published through the client's pool and must come out
// of that connection, so that a half-open connection, a mute proxy and a connection
// to the wrong server are all found. A lost connection is made again after 10 ms,
// later after up to a second, and all channels are subscribed anew, 512 at a time.
//
// What the server has lost is told by its incarnation, a key that is bound to the
// server's run_id. A flush, a restart and a failover give a new one. Redis' default
// persistence loses up to a second of writes, and a failover loses what the replica
// did not have yet; who runs with "appendonly yes" and "appendfsync always", and fails
// over to nobody, can say so with [WithDurable] and has no loss reported for a restart.
//
// # Limits
//
// A frame has at most 8 MiB ([Backend.MaxFrame]): Redis closes a subscriber's
// connection that has more than "client-output-buffer-limit pubsub" (32 MiB, or 8 MiB
// for a minute) to read. maxmemory-policy should be noeviction or one of the volatile
// ones with room to spare: an evicted key is lost state, and told as such.
//
// A user for this package needs no more than this, for namespace "dchannel":
//
//	user app on >secret ~{dchannel/0}:* resetchannels &{dchannel/0}:* +@connection
//	  +evalsha +eval +subscribe +unsubscribe +publish +info +time
//	  +get +set +mget +unlink +del +pttl +pexpire +xadd +xrange +xrevrange
//	  +hget +hmget +hset +hdel +zadd +zrem +zcard +zscore +zrange +zrangebyscore
//
// # Cluster
//
// Not yet: a client for Redis Cluster, or a Ring, is refused. All keys of a channel
// are in one hash slot already, and each knows its partition's incarnation.
//
// # Server versions
//
// Redis 6.2 or newer (XADD MINID); made and tested with 7.0. go-redis 9.23 or newer.
package redis
