package etcd

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dchannel/dchannel"
)

// lockCall is one call on a channel's lock: it reads, decides, and writes on the condition that what it
// read is still so, until that succeeds.
type lockCall struct {
	*Backend
	ctx       context.Context
	name      string
	token     string
	lease     ownLease // for a hold or a place, when one is needed
	conflicts int
}

func (b *Backend) lockCall(ctx context.Context, channel, token string) (*lockCall, func(), error) {
	ctx, done, err := b.begin(ctx)
	if err != nil {
		return nil, nil, err
	}
	if err := b.ready(ctx); err != nil {
		done()
		return nil, nil, err
	}
	c := &lockCall{Backend: b, ctx: ctx, name: escape(channel), token: token, lease: ownLease{b: b}}
	return c, func() { c.lease.drop(); done() }, nil
}

// try runs one transaction. done is false if its conditions did not hold; the caller then looks again.
func (c *lockCall) try(when []clientv3.Cmp, then ...clientv3.Op) (resp *clientv3.TxnResponse, done bool, err error) {
	k := c.memory.mark()
	resp, err = c.kv.Txn(c.ctx).If(when...).Then(then...).Commit()
	switch {
	case errors.Is(err, rpctypes.ErrLeaseNotFound) && c.conflicts < 4:
		c.leases.drop() // the server lost them; all or nothing, so nothing was done
		c.lease.keep()
	case err != nil:
		if err = mapError(c.ctx, err, true); errors.Is(err, dchannel.ErrUncertain) {
			c.lease.keep() // it may be in use
		}
		return nil, false, err
	default:
		if c.observe(k, resp.Header); resp.Succeeded {
			return resp, true, nil
		}
	}
	return nil, false, c.backOff()
}

func (c *lockCall) backOff() error {
	if c.conflicts++; c.conflicts > 1 {
		if pause(c.ctx, rand.N(time.Millisecond<<min(c.conflicts, 5))) != nil {
			return unsent(c.ctx, errContended.Error())
		}
	}
	return nil
}

// Acquire takes three trips if it succeeds (look, grant the lease, take the lock) and two if not.
func (b *Backend) Acquire(ctx context.Context, channel string, l dchannel.Lease) (dchannel.LockState, error) {
	c, end, err := b.lockCall(ctx, channel, l.Token.String())
	if err != nil {
		return dchannel.LockState{}, err
	}
	defer end()
	me := place{Token: c.token, Asked: wholeSeconds(l.TTL), Info: l.Info}
	for {
		v, err := b.lockView(c.ctx, c.name, c.token)
		if err != nil {
			return dchannel.LockState{}, err
		}
		var s dchannel.LockState
		done := true
		switch {
		case v.used(c.token):
			s, err = b.told(c.ctx, v, c.token)
		case v.closed:
			err = dchannel.ErrChanClosed
		case !v.held && (v.waiting == 0 || v.first.Token == c.token):
			s, done, err = c.take(v, v.ended(), me)
		case l.Fair:
			s, done, err = c.lineUp(v, me)
		default:
			s, err = b.told(c.ctx, v, c.token)
		}
		if err != nil {
			return dchannel.LockState{}, err
		}
		if done {
			return s, nil
		}
	}
}

// take begins who's generation, behind ends. It ends the one that is held, if there is one.
func (c *lockCall) take(v lockView, ends []ending, who place) (s dchannel.LockState, done bool, err error) {
	if err := c.lease.get(c.ctx, who.Asked); err != nil {
		return s, false, err
	}
	next := v
	next.held = true
	next.gen = generation{
		Fence: c.fence.next(v.gen.Fence), Token: who.Token,
		Asked: who.Asked, TTL: c.lease.ttl, Info: who.Info,
	}
	hold := encode(next.gen)
	next.gen.Ended = ends
	record, err := c.putRecord(next.gen)
	if err != nil {
		return s, false, err
	}
	ops := []clientv3.Op{record, clientv3.OpPut(c.keys.hold(c.name), hold, clientv3.WithLease(c.lease.id))}
	if v.waiting > 0 {
		ops = append(ops, clientv3.OpDelete(c.keys.place(c.name, who.Token)))
		next.waiting--
	}
	_, done, err = c.try(append(v.still(c.keys), v.open(c.keys), v.turn(c.keys)), ops...)
	if err != nil || !done {
		return s, false, err
	}
	since := c.lease.since
	c.lease.keep()
	c.fence.saw(next.gen.Fence)
	c.revoke(v.lease)
	if v.waiting > 0 {
		c.revoke(v.first.lease)
	}
	return next.since(since, c.token), true, nil
}

// putRecord makes the write of a record. It outlives its generation by lockMemory.
func (c *lockCall) putRecord(g generation) (clientv3.Op, error) {
	lease, err := c.recordLease(g)
	if err != nil {
		return clientv3.Op{}, err
	}
	return clientv3.OpPut(c.keys.record(c.name), encode(g), clientv3.WithLease(lease)), nil
}

func (c *lockCall) recordLease(g generation) (clientv3.LeaseID, error) {
	lease, err := c.leases.get(c.ctx, max(c.opts.idle, lockMemory)+time.Duration(g.TTL)*time.Second)
	if err != nil {
		return 0, mapUnsent(c.ctx, err)
	}
	return lease, nil
}

// Extend keeps the lease alive if the time is the same as before, and else moves the hold
// to another lease, as a lease's time cannot be changed.
func (b *Backend) Extend(ctx context.Context, channel string, token dchannel.ID, ttl time.Duration) (dchannel.LockState, error) {
	c, end, err := b.lockCall(ctx, channel, token.String())
	if err != nil {
		return dchannel.LockState{}, err
	}
	defer end()
	asked, lapsed := wholeSeconds(ttl), false
	for {
		v, err := b.lockView(c.ctx, c.name, c.token)
		if err != nil {
			return dchannel.LockState{}, err
		}
		if !v.held || v.gen.Token != c.token {
			return b.told(c.ctx, v, c.token)
		}
		var s dchannel.LockState
		done := false
		if v.gen.Asked == asked && !lapsed {
			s, done, lapsed, err = c.keepAlive(v)
		} else {
			s, done, err = c.move(v, asked)
		}
		if err != nil || done {
			return s, err
		}
	}
}

// keepAlive renews the hold's lease and looks whether the hold is under it afterwards, so that the
// two are as good as one step. lapsed says that there is no such lease any more.
func (c *lockCall) keepAlive(v lockView) (s dchannel.LockState, done, lapsed bool, err error) {
	since := time.Now() // before the server starts to count anew
	_, err = c.client.KeepAliveOnce(c.ctx, v.lease)
	if errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return s, false, true, nil
	}
	if err != nil {
		return s, false, false, mapError(c.ctx, err, true)
	}
	lease, err := c.recordLease(v.gen)
	if err != nil {
		return s, false, false, err
	}
	var now lockView
	if lease == v.recordLease {
		if now, err = c.lockView(c.ctx, c.name, c.token); err != nil {
			return s, false, false, err
		}
		done = now.held && now.record == v.record && now.lease == v.lease
	} else {
		// Time for the record to be renewed, too.
		now = v
		hold := clientv3.Compare(clientv3.LeaseValue(c.keys.hold(c.name)), "=", v.lease)
		_, done, err = c.try(append(v.still(c.keys), hold),
			clientv3.OpPut(c.keys.record(c.name), encode(v.gen), clientv3.WithLease(lease)))
	}
	if err != nil || !done {
		return s, false, false, err
	}
	return now.since(since, c.token), true, false, nil
}

// move puts the hold under a new lease.
func (c *lockCall) move(v lockView, asked int64) (s dchannel.LockState, done bool, err error) {
	if err := c.lease.get(c.ctx, asked); err != nil {
		return s, false, err
	}
	next := v
	next.gen.Asked, next.gen.TTL = asked, c.lease.ttl
	record, err := c.putRecord(next.gen)
	if err != nil {
		return s, false, err
	}
	hold := next.gen
	hold.Ended = nil
	_, done, err = c.try(v.still(c.keys), record,
		clientv3.OpPut(c.keys.hold(c.name), encode(hold), clientv3.WithLease(c.lease.id)))
	if err != nil || !done {
		return s, false, err
	}
	since := c.lease.since
	c.lease.keep()
	c.revoke(v.lease)
	return next.since(since, c.token), true, nil
}

// LockState is one linearizable read, and a second one for the time left if the lock is held. It writes nothing.
func (b *Backend) LockState(ctx context.Context, channel string) (dchannel.LockState, error) {
	ctx, done, err := b.begin(ctx)
	if err != nil {
		return dchannel.LockState{}, err
	}
	defer done()
	v, err := b.lockView(ctx, escape(channel), "")
	if err != nil {
		return dchannel.LockState{}, err
	}
	return b.told(ctx, v, "")
}

// Release ends the generation and begins that of the first in line, if there is one, in one transaction.
func (b *Backend) Release(ctx context.Context, channel string, token dchannel.ID) (dchannel.LockState, error) {
	return b.endLock(ctx, channel, token.String(), dchannel.LockReleased, func(g generation) bool { return g.Token == token.String() })
}

// EndLock is Release without the token. A lock that ends because its channel was closed goes to nobody.
func (b *Backend) EndLock(ctx context.Context, channel string, fence uint64, outcome dchannel.LockOutcome) (dchannel.LockState, error) {
	return b.endLock(ctx, channel, "", outcome, func(g generation) bool { return fence == 0 || g.Fence == fence })
}

func (b *Backend) endLock(ctx context.Context, channel, token string, how dchannel.LockOutcome, which func(generation) bool) (dchannel.LockState, error) {
	c, end, err := b.lockCall(ctx, channel, token)
	if err != nil {
		return dchannel.LockState{}, err
	}
	defer end()
	for {
		v, err := b.lockView(c.ctx, c.name, c.token)
		if err != nil {
			return dchannel.LockState{}, err
		}
		var s dchannel.LockState
		done := false
		switch {
		case v.held && which(v.gen) && v.waiting > 0 && !v.closed && how != dchannel.LockClosed:
			s, done, err = c.take(v, v.gen.endedAs(how), v.first)
		case v.held && which(v.gen):
			s, done, err = c.free(v, how)
		case v.own.made != 0:
			s, done, err = c.leave(v)
		default:
			s, err = b.told(c.ctx, v, c.token)
			done = true
		}
		if err != nil || done {
			return s, err
		}
	}
}

// free ends the generation; nobody has the lock then.
func (c *lockCall) free(v lockView, how dchannel.LockOutcome) (s dchannel.LockState, done bool, err error) {
	next := v
	next.held = false
	next.gen.Ended = v.gen.endedAs(how)
	record, err := c.putRecord(next.gen)
	if err != nil {
		return s, false, err
	}
	when := v.still(c.keys)
	if how != dchannel.LockClosed && !v.closed {
		when = append(when, v.turn(c.keys)) // nobody has lined up meanwhile
	}
	_, done, err = c.try(when, record, clientv3.OpDelete(c.keys.hold(c.name)))
	if err != nil || !done {
		return s, false, err
	}
	c.revoke(v.lease)
	return next.state(c.token), true, nil
}
