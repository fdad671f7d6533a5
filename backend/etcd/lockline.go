package etcd

import (
	"errors"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/dchannel/dchannel"
)

// The line is a key for each waiter, on a lease of the time that it asked for, which its calls
// of Acquire keep alive. They stand in the order in which the keys were made.

// lineUp makes sure of a place in the line behind a lock that is not free for who.
func (c *lockCall) lineUp(v lockView, who place) (s dchannel.LockState, done bool, err error) {
	if v.own.made != 0 && v.own.Asked == who.Asked && v.own.Info == who.Info {
		_, err := c.client.KeepAliveOnce(c.ctx, v.own.lease)
		switch {
		case errors.Is(err, rpctypes.ErrLeaseNotFound): // the place is lost, or about to be
			return s, false, c.backOff()
		case err != nil:
			return s, false, mapError(c.ctx, err, true)
		}
		s, err = c.told(c.ctx, v, c.token)
		return s, true, err
	}
	if err := c.lease.get(c.ctx, who.Asked); err != nil {
		return s, false, err
	}
	// Behind the very generation that was seen: had it ended meanwhile, it would have ended without
	// handing over.
	when := append(v.still(c.keys), clientv3.Compare(clientv3.CreateRevision(c.keys.place(c.name, who.Token)), "=", v.own.made))
	if !v.held { // then it is those before who keep it from being ours
		when = append(when, v.turn(c.keys))
	}
	resp, done, err := c.try(when,
		clientv3.OpPut(c.keys.place(c.name, who.Token), encode(who), clientv3.WithLease(c.lease.id)),
		clientv3.OpGet(c.keys.line(c.name), clientv3.WithPrefix(), clientv3.WithCountOnly()))
	if err != nil || !done {
		return s, false, err
	}
	c.lease.keep()
	c.revoke(v.own.lease)
	v.waiting = int(resp.Responses[1].GetResponseRange().Count)
	s, err = c.told(c.ctx, v, c.token)
	return s, true, err
}

// leave gives the place in the line up.
func (c *lockCall) leave(v lockView) (s dchannel.LockState, done bool, err error) {
	_, done, err = c.try([]clientv3.Cmp{
		clientv3.Compare(clientv3.CreateRevision(c.keys.place(c.name, c.token)), "=", v.own.made),
	}, clientv3.OpDelete(c.keys.place(c.name, c.token)))
	if err != nil || !done {
		return s, false, err
	}
	c.revoke(v.own.lease)
	v.waiting--
	s, err = c.told(c.ctx, v, c.token)
	return s, true, err
}
